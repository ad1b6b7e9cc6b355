//! Keys that are bound to networks are checked against the address that Envoy trusts.

use anyhow::Result;
use contract::outcome::Outcome;
use contract::record::{Record, Requires};
use http_body_util::Full;
use hyper::Request;
use portcullis_tests::expect::{IDENTITY, assert_refused, assert_upstream};
use portcullis_tests::filter_harness::{FilterHarness, with};
use portcullis_tests::http::{Outgoing, Reply};

fn bound(number: u8, networks: &[&str]) -> Record {
    with(number, |r| {
        r.networks = networks.iter().filter_map(|network| network.parse().ok()).collect();
        r.requires = Requires::NETWORKS;
    })
}

fn request(key: &str, forwarded_for: &str) -> Result<Outgoing> {
    Ok(Request::get("/").header("x-api-key", key).header("x-forwarded-for", forwarded_for).body(Full::default())?)
}

#[track_caller]
fn assert_admitted(reply: &Reply, admitted: bool) {
    if admitted {
        assert_eq!(reply.status, 200);
    } else {
        assert_refused(reply, Outcome::AddressDenied, &[]);
    }
}

#[tokio::test]
async fn behind_a_trusted_proxy_the_address_that_it_saw_counts() -> Result<()> {
    let keys = [("bound", bound(1, &["192.0.2.0/24", "2001:db8::/32"]))];
    let harness = FilterHarness::builder().behind_a_proxy().start(&keys).await?;
    for (forwarded_for, admitted) in [
        ("192.0.2.7", true),
        ("192.0.3.7", false),
        ("2001:db8::5", true),
        ("2001:db9::5", false),
        // What the client says of itself stands before what the proxy saw.
        ("192.0.2.7, 198.51.100.1", false),
        ("198.51.100.1, 192.0.2.7", true),
        ("no address", false),
    ] {
        assert_admitted(&harness.send(request("bound", forwarded_for)?).await?, admitted);
    }
    assert_refused(&harness.get("/", Some("bound")).await?, Outcome::AddressDenied, &[]);
    Ok(())
}

#[tokio::test]
async fn without_a_trusted_proxy_only_the_peers_address_counts() -> Result<()> {
    let keys = [("remote", bound(1, &["192.0.2.0/24"])), ("local", bound(2, &["127.0.0.0/8", "::1"]))];
    let harness = FilterHarness::start(&keys).await?;
    assert_admitted(&harness.send(request("remote", "192.0.2.7")?).await?, false);
    assert_admitted(&harness.send(request("local", "192.0.2.7")?).await?, true);

    assert_upstream(&harness.get("/", Some("local")).await?, &IDENTITY);
    Ok(())
}

#[tokio::test]
async fn an_ipv4_address_that_is_written_as_an_ipv6_one_is_that_ipv4_address() -> Result<()> {
    let keys = [
        ("plain", bound(1, &["192.0.2.0/24"])),
        ("mapped", bound(2, &["::ffff:192.0.2.0/120"])),
        ("one", bound(3, &["::ffff:192.0.2.7"])),
        ("all", bound(4, &["::ffff:0:0/96"])),
        ("other", bound(5, &["::ffff:198.51.100.0/120", "::/0"])),
    ];
    let harness = FilterHarness::builder().behind_a_proxy().start(&keys).await?;
    for address in ["192.0.2.7", "::ffff:192.0.2.7", "::FFFF:c000:207"] {
        for key in ["plain", "mapped", "one", "all"] {
            assert_admitted(&harness.send(request(key, address)?).await?, true);
        }
        assert_admitted(&harness.send(request("other", address)?).await?, false);
    }
    assert_admitted(&harness.send(request("one", "::ffff:192.0.2.8")?).await?, false);
    Ok(())
}

/// A socket of both families tells of IPv4 peers in the form of IPv6.
#[tokio::test]
async fn a_listener_of_both_families_sees_ipv4_peers_as_such() -> Result<()> {
    let keys = [("local", bound(1, &["127.0.0.0/8"])), ("remote", bound(2, &["192.0.2.0/24"]))];
    let harness = FilterHarness::builder().both_families().start(&keys).await?;
    let address = (std::net::Ipv4Addr::LOCALHOST, harness.envoy.address().port()).into();
    for (key, admitted) in [("local", true), ("remote", false)] {
        let reply = portcullis_tests::http::send(address, portcullis_tests::http::get_request("/", Some(key))?).await?;
        assert_admitted(&reply, admitted);
    }
    Ok(())
}
