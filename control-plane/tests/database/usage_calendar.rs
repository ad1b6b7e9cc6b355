//! Usage by days, weeks and months of a time zone, and ranges that the stored usage cannot answer exactly.

use crate::support::{Fixture, execute, scalar};
use contract::key::Secret;
use control_plane::metering::events;
use control_plane::metering::retention::roll_up;
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

/// A key, and hours that it was used in: requests of the outcome `allowed`, which cost two credits each, and as many of
/// `rate_limited`.
async fn used(pool: &PgPool, hours: &[(&str, i64)]) -> (Fixture, Secret, Uuid) {
    let (fixture, admin) = Fixture::with_admin(pool).await;
    let (id, _) = fixture.key("a@example.com", &[]).await;
    for (hour, requests) in hours {
        for (outcome, cost) in [(0, requests * 2), (8, 0)] {
            let values = format!("('{id}', '{hour}'::text::timestamptz, '{outcome}', 1, '{requests}', '{cost}')");
            execute(pool, format!("insert into usage_hourly values {values}")).await;
        }
    }
    (fixture, admin, id)
}

/// The start and the allowed requests of each sum. Asserts that a sum has as many refused requests, and costs twice as much.
async fn sums(fixture: &Fixture, admin: &Secret, query: &str) -> Vec<(String, i64)> {
    let answer = fixture.get(&format!("/v1/usage?email=a@example.com&{query}"), admin).await.expect(200);
    let sum = |row: &Value| {
        let of = |field: &str| row[field].as_i64().unwrap();
        let allowed = of("allowed");
        let counts = ["requests", "refused", "other", "cost"].map(of);
        assert_eq!(counts, [allowed * 2, allowed, 0, allowed * 2], "{row}");
        (row["start"].as_str().unwrap_or_default().to_owned(), allowed)
    };
    answer["usage"].as_array().unwrap().iter().map(sum).collect()
}

fn expected(sums: &[(&str, i64)]) -> Vec<(String, i64)> {
    sums.iter().map(|(start, allowed)| ((*start).to_owned(), *allowed)).collect()
}

#[sqlx::test(migrations = "./migrations")]
async fn days_weeks_and_months_begin_in_the_time_zone(pool: PgPool) {
    let hours = [
        // The last hour of March and the first of April in Berlin.
        ("2026-03-31 21:00Z", 1),
        ("2026-03-31 22:00Z", 2),
        // Sunday and Monday.
        ("2026-04-05 21:00Z", 4),
        ("2026-04-05 22:00Z", 8),
        ("2026-04-30 21:00Z", 16),
        ("2026-04-30 22:00Z", 32),
    ];
    let (fixture, admin, id) = used(&pool, &hours).await;
    let sums = async |query: &str| sums(&fixture, &admin, query).await;
    let berlin = "time_zone=Europe/Berlin&from=2026-04-01&to=2026-05-01";
    assert_eq!(sums(&format!("{berlin}&interval=total")).await, expected(&[("", 30)]));
    let april = expected(&[("2026-04-01T00:00:00+02:00", 30)]);
    assert_eq!(sums(&format!("{berlin}&interval=month")).await, april);
    assert_eq!(
        sums(&format!("{berlin}&interval=week")).await,
        // The first week began before the range, and is counted from the first of April.
        expected(&[
            ("2026-03-30T00:00:00+02:00", 6),
            ("2026-04-06T00:00:00+02:00", 8),
            ("2026-04-27T00:00:00+02:00", 16),
        ])
    );
    assert_eq!(
        sums(&format!("{berlin}&interval=day")).await,
        expected(&[
            ("2026-04-01T00:00:00+02:00", 2),
            ("2026-04-05T00:00:00+02:00", 4),
            ("2026-04-06T00:00:00+02:00", 8),
            ("2026-04-30T00:00:00+02:00", 16),
        ])
    );
    let hour = "time_zone=Europe/Berlin&from=2026-04-05T23:00&to=2026-04-06T01:00:00&interval=hour";
    let of_hour = expected(&[("2026-04-05T23:00:00+02:00", 4), ("2026-04-06T00:00:00+02:00", 8)]);
    assert_eq!(sums(hour).await, of_hour);
    // In UTC, as without a time zone.
    let utc = "from=2026-04-01&to=2026-05-01T00:00:00Z&interval=month";
    assert_eq!(sums(utc).await, expected(&[("2026-04-01T00:00:00Z", 60)]));

    let of_key = format!("/v1/keys/{id}/usage?{berlin}");
    let of_key = fixture.get(&of_key, &admin).await.expect(200);
    let counts = json!({"requests": 60, "allowed": 30, "refused": 30, "other": 0, "cost": 60});
    assert_eq!((&of_key["sum"], &of_key["hours"][0]["hour"]), (&counts, &json!("2026-04-01T00:00:00+02:00")));
    let range = ["from", "to", "time_zone"].map(|field| of_key[field].as_str().unwrap());
    assert_eq!(range, ["2026-04-01T00:00:00+02:00", "2026-05-01T00:00:00+02:00", "Europe/Berlin"]);
    let csv = fixture.get(&format!("/v1/usage?email=a@example.com&{berlin}&interval=month&format=csv"), &admin).await;
    let lines = "start,requests,allowed,refused,other,cost\r\n2026-04-01T00:00:00+02:00,60,30,30,0,60\r\n";
    assert_eq!((csv.status, String::from_utf8(csv.body).unwrap()), (200, lines.into()));
}

#[sqlx::test(migrations = "./migrations")]
async fn the_day_on_which_clocks_go_back_has_25_hours(pool: PgPool) {
    let hours: Vec<String> = (0..72).map(|hour| format!("2026-10-{} {}:00Z", 24 + hour / 24, hour % 24)).collect();
    let hours: Vec<(&str, i64)> = hours.iter().map(|hour| (hour.as_str(), 1)).collect();
    let (fixture, admin, _) = used(&pool, &hours).await;
    let days = "time_zone=Europe/Berlin&from=2026-10-24&to=2026-10-27&interval=day";
    let counted =
        [("2026-10-24T00:00:00+02:00", 22), ("2026-10-25T00:00:00+02:00", 25), ("2026-10-26T00:00:00+01:00", 24)];
    assert_eq!(sums(&fixture, &admin, days).await, expected(&counted));
    // The page after the first sum goes on with the same days.
    let uri = format!("/v1/usage?email=a@example.com&{days}&limit=1");
    let mut reply = fixture.get(&uri, &admin).await;
    for (start, allowed) in counted {
        let row = &reply.json()["usage"][0];
        assert_eq!((row["start"].as_str(), row["allowed"].as_i64()), (Some(start), Some(allowed)));
        let Some(next) = reply.headers.get("link") else { break };
        let next = next.to_str().unwrap().strip_prefix('<').unwrap().split_once('>').unwrap().0.to_owned();
        reply = fixture.get(&next, &admin).await;
    }
    // A month of 31 days and an hour, by the hour.
    let october = "time_zone=Europe/Berlin&from=2026-10-01&to=2026-11-01&interval=hour";
    assert_eq!(sums(&fixture, &admin, october).await.len(), 72);
}

#[sqlx::test(migrations = "./migrations")]
async fn a_range_that_stored_hours_cannot_answer_is_refused(pool: PgPool) {
    let (fixture, admin, id) = used(&pool, &[("2026-04-05 21:00Z", 4)]).await;
    let of_hour = |text: &str, at: &str, before: &str, after: &str| {
        format!(
            "must be the start of an hour of UTC, by which usage is stored, and {text} is {at}: give {before} or {after}"
        )
    };
    let half = of_hour("2026-04-05T10:30", "2026-04-05T10:30:00Z", "2026-04-05T10:00:00Z", "2026-04-05T11:00:00Z");
    let kolkata = of_hour("2026-04-01", "2026-03-31T18:30:00Z", "2026-03-31T18:00:00Z", "2026-03-31T19:00:00Z");
    for (query, field, detail) in [
        ("from=2026-04-05T10:30&to=2026-04-06", "from", half.as_str()),
        ("time_zone=Asia/Kolkata&from=2026-04-01&to=2026-05-01", "from", &kolkata),
        (
            "time_zone=CEST&from=2026-04-01",
            "time_zone",
            "must be a time zone of the IANA database such as Europe/Berlin",
        ),
        (
            "time_zone=Europe/Berlin&from=2026-03-29T02:00&to=2026-04-01",
            "from",
            "must be another time, because clocks in Europe/Berlin skip 2026-03-29T02:00",
        ),
        (
            "from=2026-04-01T00:00:00+02:00&to=2026-04-02",
            "from",
            "must have the plus sign of its offset encoded as %2B",
        ),
    ] {
        for uri in ["/v1/usage".to_owned(), format!("/v1/keys/{id}/usage")] {
            fixture.get(&format!("{uri}?{query}"), &admin).await.assert_invalid(field, detail);
        }
    }
    let kolkata = "/v1/usage?time_zone=Asia/Kolkata&from=2026-04-01T00:00:00Z&to=2026-05-01T00:00:00Z";
    let detail = "must have an offset of whole hours: usage is stored by the hour of UTC, and a day of Asia/Kolkata begins \
                  at 2026-04-01T18:30:00Z. Give another time zone, or the interval hour or total";
    fixture.get(&format!("{kolkata}&interval=day"), &admin).await.assert_invalid("time_zone", detail);
    // Sums that begin and end with hours are exact in that time zone too.
    for (interval, start) in [("hour", json!("2026-04-06T02:30:00+05:30")), ("total", Value::Null)] {
        let usage = fixture.get(&format!("{kolkata}&interval={interval}"), &admin).await.expect(200);
        assert_eq!((&usage["usage"][0]["start"], &usage["usage"][0]["allowed"]), (&start, &json!(4)));
    }
}

#[sqlx::test(migrations = "./migrations")]
async fn usage_that_was_rolled_up_to_days_is_summed_by_whole_days_of_utc_only(pool: PgPool) {
    let hours = [("2020-12-31 22:00Z", 1), ("2020-12-31 23:00Z", 2), ("2021-01-15 10:00Z", 4)];
    let (fixture, admin, id) = used(&pool, &hours).await;
    let months = "interval=month&from=2020-12-01&to=2021-02-01";
    let berlin = format!("time_zone=Europe/Berlin&{months}");
    let counted = [("2020-12-01T00:00:00+01:00", 1), ("2021-01-01T00:00:00+01:00", 6)];
    assert_eq!(sums(&fixture, &admin, &berlin).await, expected(&counted), "hours are there");

    events::export_all(&pool).await.unwrap();
    roll_up(&pool, 90).await.unwrap();
    assert_eq!(scalar::<i64>(&pool, "select count(*) from usage_hourly").await, 0);
    let counted = [("2020-12-01T00:00:00Z", 3), ("2021-01-01T00:00:00Z", 4)];
    assert_eq!(sums(&fixture, &admin, months).await, expected(&counted));
    let days = "interval=day&from=2020-12-31&to=2021-01-16";
    let counted = [("2020-12-31T00:00:00Z", 3), ("2021-01-15T00:00:00Z", 4)];
    assert_eq!(sums(&fixture, &admin, days).await, expected(&counted));

    let later = |remedy: &str, day: &str| {
        format!(
            "{remedy}, or from must be {day}T00:00:00Z or later: usage before that is stored by the day of UTC only"
        )
    };
    let midnight = "must be midnight of UTC";
    for (query, field, detail) in [
        (berlin.as_str(), "time_zone", later("must be UTC", "2021-01-01")),
        ("from=2020-12-31T23:00&to=2021-01-01", "from", later(midnight, "2021-01-01")),
        (
            "from=2020-12-31&to=2021-01-15T23:00",
            "to",
            "must be midnight of UTC: usage before 2021-01-16T00:00:00Z is stored by the day of UTC only".into(),
        ),
        (
            "interval=hour&from=2020-12-31&to=2021-01-16",
            "interval",
            later("must be day, week, month or total", "2021-01-16"),
        ),
    ] {
        fixture.get(&format!("/v1/usage?{query}"), &admin).await.assert_invalid(field, &detail);
        if field != "interval" && field != "time_zone" {
            fixture.get(&format!("/v1/keys/{id}/usage?{query}"), &admin).await.assert_invalid(field, &detail);
        }
    }
    // A range that cuts no stored day is answered in any time zone.
    let january = "time_zone=Europe/Berlin&interval=total&from=2021-01-15T01:00&to=2021-01-17T01:00";
    assert_eq!(sums(&fixture, &admin, january).await, expected(&[("", 4)]));
    let empty = "time_zone=Europe/Berlin&interval=day&from=2021-01-02&to=2021-01-10";
    assert_eq!(sums(&fixture, &admin, empty).await, expected(&[]));

    // Requests without a key are rolled up too.
    execute(&pool, "insert into usage_keyless_daily values ('2020-06-01 00:00Z', 1, 8)").await;
    let keyless = "/v1/usage?from=2020-05-31T22:00&to=2020-06-03";
    assert_eq!(fixture.get(keyless, &admin).await.expect(200)["usage"][0]["refused"], 8);
    let keyless = "/v1/usage?from=2020-06-01T22:00&to=2020-06-03";
    fixture.get(keyless, &admin).await.assert_invalid("from", &later(midnight, "2020-06-02"));
}
