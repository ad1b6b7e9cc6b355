//! Which policy a request gets: that of the first source that names one, or else the default policy.

use contract::policy::{NamedPolicy, Policy};
use contract::rules::{AmbiguousTarget, Target};

use super::Request;
use crate::config::PolicySource;
use crate::host::{Host, PolicyPlace, Stream};
use crate::keys::KeyLookup;

impl<'a, H: Host, K: KeyLookup> Request<'a, H, K> {
    /// The policy of the request; `None` if an unknown one is named.
    pub(super) fn find_policy(&self, stream: &impl Stream) -> Option<&'a Policy> {
        // A policy of the name `default` comes with the first one and stays, so that names are looked for from then on.
        if self.definitions.has_no_policies() && !self.config.are_sources_given {
            return Some(Policy::PLAIN);
        }
        for source in &self.config.policy_sources {
            if let Some(found) = self.look_in(source, stream) {
                return match found {
                    Ok(policy) => {
                        if *source != PolicySource::Rules {
                            self.vm.seen.borrow_mut().policy(&policy.name);
                        }
                        Some(&policy.policy)
                    }
                    Err(name) => {
                        self.report_unknown_policy(source, &name);
                        None
                    }
                };
            }
        }
        Some(self.definitions.default_policy())
    }

    /// The policy that a source names, or the name if the source may not name it. `None`: it names none.
    fn look_in(&self, source: &PolicySource, stream: &impl Stream) -> Option<Result<&'a NamedPolicy, String>> {
        let policy = |name: String| self.definitions.policy(&name).ok_or(name);
        // The owner of a route may not choose every policy.
        let of_owner = |name: String| match self.definitions.policy(&name) {
            Some(policy) if policy.from_annotation => Ok(policy),
            _ => Err(name),
        };
        match source {
            PolicySource::RouteMetadata => stream.named_policy(PolicyPlace::Route).map(policy),
            PolicySource::VirtualHostMetadata => stream.named_policy(PolicyPlace::VirtualHost).map(policy),
            PolicySource::Annotation(annotation) => {
                stream.named_policy(PolicyPlace::Annotation(annotation)).map(of_owner)
            }
            PolicySource::RouteName => {
                let name = stream.named_policy(PolicyPlace::RouteName)?;
                self.definitions.policy(&name).map(|_| of_owner(name))
            }
            PolicySource::RouteNamePrefix(prefix) => {
                let name = stream.named_policy(PolicyPlace::RouteName)?;
                name.strip_prefix(prefix).map(|name| of_owner(name.to_owned()))
            }
            PolicySource::Rules => match self.definitions.rules().find(&RuleTarget(stream)) {
                Ok(rule) => rule.map(|rule| policy(rule.policy.clone())),
                Err(AmbiguousTarget) => Some(Err(String::new())),
            },
        }
    }

    /// Logs the name of an unknown policy, once in each VM.
    fn report_unknown_policy(&self, source: &PolicySource, name: &str) {
        if !self.vm.is_new_unknown_policy(name) {
            return;
        }
        let place = match source {
            PolicySource::RouteMetadata => "the metadata of a route".to_owned(),
            PolicySource::VirtualHostMetadata => "the metadata of a virtual host".to_owned(),
            PolicySource::Annotation(annotation) => format!("the annotation {annotation} of a route"),
            PolicySource::RouteName | PolicySource::RouteNamePrefix(_) => "the name of a route".to_owned(),
            PolicySource::Rules => "a rule".to_owned(),
        };
        let problem = match (source, name) {
            (PolicySource::Rules, "") => {
                "requests have paths with dot segments or encoded slashes, or hosts of more than 260 bytes, which rules cannot \
                 be applied to: let Envoy normalise paths and refuse encoded slashes"
                    .to_owned()
            }
            (_, "") => format!("{place} has no policy name where one belongs: write it as {{policy: NAME}}"),
            (_, name) if self.definitions.policy(name).is_some() => {
                format!("{place} names the policy {name:?}, which has from_annotation false: name another policy")
            }
            (_, name) => {
                format!(
                    "{place} names the policy {name:?}, which does not exist: write it with PUT /v1/policies/{name}"
                )
            }
        };
        self.vm.host().error(&format!("{problem}; until then such requests are refused"));
    }
}

/// A request as rules see it.
struct RuleTarget<'a, S>(&'a S);

impl<S: Stream> Target for RuleTarget<'_, S> {
    fn host(&self) -> Option<Vec<u8>> {
        self.0.header(":authority")
    }

    fn path(&self) -> Option<Vec<u8>> {
        self.0.header(":path")
    }

    fn method(&self) -> Option<Vec<u8>> {
        self.0.header(":method")
    }

    fn header(&self, name: &str) -> Option<Vec<u8>> {
        self.0.header(name)
    }
}
