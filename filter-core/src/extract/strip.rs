//! Removal of keys from a request.

use std::cell::LazyCell;

use super::source::{Remainder, Source};
use super::{Extraction, value_of};
use crate::host::Stream;

/// Removes the key from its place, and from all other places that have it too. Headers without another use are removed in any
/// case. Other places are read only if several are configured.
pub fn strip(sources: &[Source], extraction: &Extraction<'_>, stream: &mut impl Stream) {
    for source in sources {
        match (source, &extraction.place) {
            (Source::Header(name), _) => stream.remove_header(name),
            (_, Some((place, value))) if source == *place => cut(source, value, stream),
            _ => {}
        }
    }
    if let Some((place, value)) = &extraction.place {
        let others = sources.iter().filter(|other| other != place && !matches!(other, Source::Header(_)));
        let key = LazyCell::new(|| place.find(value));
        for other in others {
            // Read only now: the key that was cut may have been in the same header.
            if let Some(there) = value_of(other, stream)
                && key.as_ref().is_some_and(|key| other.holds(&there, key))
            {
                cut(other, &there, stream);
            }
        }
    }
}

/// Removes keys from the path and the cookies of a refused request, because access logs show those.
pub fn conceal(sources: &[Source], stream: &mut impl Stream) {
    for source in sources {
        if let Source::Query(_) | Source::Cookie(_) = source
            && let Some(value) = value_of(source, stream)
        {
            cut(source, &value, stream);
        }
    }
}

/// Sets a header to the rest of its value without keys.
fn cut(source: &Source, value: &[u8], stream: &mut impl Stream) {
    match source.without(value) {
        Remainder::Nothing => stream.remove_header(source.header()),
        Remainder::Value(rest) if rest == value => {}
        Remainder::Value(rest) => stream.set_header(source.header(), &rest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extract::find_and_hash;
    use crate::mock::MockStream;

    fn sources() -> [Source; 4] {
        let header = Source::Header("x-api-key".into());
        [header, Source::Bearer(true), Source::Query("k".into()), Source::Cookie("k".into())]
    }

    fn stripped(sources: &[Source], headers: &[(&str, &str)]) -> MockStream {
        let mut stream = MockStream::with(headers.iter().copied());
        let extraction = find_and_hash(sources, &stream);
        strip(sources, &extraction, &mut stream);
        stream
    }

    #[test]
    fn the_key_goes_from_every_place_and_the_rest_stays() {
        let headers = [
            ("x-api-key", "x"),
            ("authorization", "Bearer x"),
            (":path", "/orders?page=2&k=x#top"),
            ("cookie", "a=1; k=x; b=2"),
        ];
        let stream = stripped(&sources(), &headers);
        assert_eq!(stream.headers(), [(":path", "/orders?page=2#top"), ("cookie", "a=1; b=2")]);
    }

    #[test]
    fn a_place_with_another_value_stays_as_it_is_unless_the_header_is_for_keys_only() {
        let headers = [("authorization", "Bearer x"), (":path", "/?k=y"), ("cookie", "k=z"), ("x-api-key", "")];
        let stream = stripped(&sources(), &headers);
        assert_eq!(stream.headers(), [(":path", "/?k=y"), ("cookie", "k=z")]);
    }

    #[test]
    fn a_header_whose_only_content_was_the_key_is_removed() {
        assert_eq!(stripped(&sources(), &[("cookie", "k=x"), (":path", "/")]).headers(), [(":path", "/")]);
        assert_eq!(stripped(&sources(), &[("cookie", "k=x"), (":path", "/?k=x")]).headers(), [(":path", "/")]);
    }

    #[test]
    fn two_parameters_in_one_header_are_both_removed() {
        let sources = [Source::Query("a".into()), Source::Query("b".into())];
        assert_eq!(stripped(&sources, &[(":path", "/?a=x&b=x&c=x")]).headers(), [(":path", "/?c=x")]);
        assert_eq!(stripped(&sources, &[(":path", "/?a=x&b=y&c=x")]).headers(), [(":path", "/?b=y&c=x")]);
    }

    #[test]
    fn without_a_key_only_headers_for_keys_are_removed() {
        let headers = [("x-api-key", ""), ("authorization", "Basic abc"), (":path", "/?k="), ("cookie", "a=1")];
        let stream = stripped(&sources(), &headers);
        assert_eq!(stream.headers(), [("authorization", "Basic abc"), (":path", "/?k="), ("cookie", "a=1")]);
    }

    #[test]
    fn of_a_refused_request_the_logs_see_no_key_in_path_or_cookies() {
        let headers = [("x-api-key", "x"), ("authorization", "Bearer x"), (":path", "/a?k=x&b=1"), ("cookie", "k=y")];
        let mut stream = MockStream::with(headers);
        conceal(&sources(), &mut stream);
        assert_eq!(stream.headers(), [("x-api-key", "x"), ("authorization", "Bearer x"), (":path", "/a?b=1")]);
        let before = stream.clone();
        conceal(&sources(), &mut stream);
        assert_eq!(stream.headers(), before.headers());
    }
}
