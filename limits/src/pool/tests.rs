use super::*;

fn record() -> Record {
    Record { plan: Some(3), ..Record::plain(KeyId([7; 16]), OwnerId([8; 16])) }
}

fn limit(name: &str, per: Per) -> RateLimit {
    RateLimit { name: name.into(), requests: 1, window_s: 1, burst: 1, shared: true, per }
}

#[test]
fn a_kind_is_found_by_its_code() {
    for kind in [Kind::Rate, Kind::Quota, Kind::Credits] {
        assert_eq!(Kind::from_code(kind.code()), Some(kind));
    }
    assert_eq!(Kind::from_code(3), None);
}

#[test]
fn pools_belong_to_the_key_or_to_its_owner_and_plan() {
    let (key, owner) = (Subject([7; 16]), Subject([8; 16]));
    let of_key = PoolId::of_limit(&limit("hour", Per::Key), &record());
    assert_eq!(of_key, PoolId { kind: Kind::Rate, subject: key, tag: tag("hour") });
    let of_owner = |plan| PoolId::of_limit(&limit("hour", Per::Owner), &Record { plan, ..record() });
    assert_eq!(of_owner(Some(3)), PoolId { kind: Kind::Rate, subject: owner, tag: tag("3/hour") });
    assert_eq!(of_owner(None).tag, owner_tag("hour", Some(0)));
    assert_eq!(PoolId::of_quota(Per::Key, &record()), PoolId { kind: Kind::Quota, subject: key, tag: 0 });
    assert_eq!(PoolId::of_quota(Per::Owner, &record()), PoolId { kind: Kind::Quota, subject: owner, tag: 3 });
    assert_eq!(PoolId::of_credits(OwnerId([8; 16])), PoolId { kind: Kind::Credits, subject: owner, tag: 0 });
}
