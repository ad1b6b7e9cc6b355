//! What a PromQL expression reads: its selectors, and the labels of its result.

use std::collections::BTreeSet;

use anyhow::{Result, anyhow};
use promql_parser::label::Matcher;
use promql_parser::parser::value::ValueType;
use promql_parser::parser::{self, BinModifier, Expr, LabelModifier, VectorSelector};

/// One metric of an expression, with the labels that the expression names of it.
#[derive(Debug)]
pub struct Selector {
    pub metric: String,
    pub matchers: Vec<Matcher>,
    /// The labels of the matchers, and those by which the expression groups or joins the metric.
    pub labels: BTreeSet<String>,
}

#[derive(Debug)]
pub struct Query(Expr);

impl Query {
    pub fn parse(expression: &str) -> Result<Self> {
        parser::parse(expression).map(Self).map_err(|why| anyhow!("{expression}: {why}"))
    }

    pub fn selectors(&self) -> Vec<Selector> {
        let mut found = Vec::new();
        collect(&self.0, &BTreeSet::new(), &mut found);
        found
    }

    /// The labels of the result. None if it has all labels of its metrics.
    pub fn result_labels(&self) -> Option<BTreeSet<String>> {
        result_labels(&self.0)
    }
}

fn collect(expression: &Expr, named: &BTreeSet<String>, found: &mut Vec<Selector>) {
    let with = |modifier: Option<&LabelModifier>| -> BTreeSet<String> {
        let more = modifier.into_iter().flat_map(|modifier| modifier.labels().labels.iter());
        named.iter().chain(more).cloned().collect()
    };
    match expression {
        Expr::VectorSelector(selector) => found.extend(selected(selector, named)),
        Expr::MatrixSelector(selector) => found.extend(selected(&selector.vs, named)),
        Expr::Aggregate(aggregate) => collect(&aggregate.expr, &with(aggregate.modifier.as_ref()), found),
        Expr::Unary(unary) => collect(&unary.expr, named, found),
        Expr::Paren(paren) => collect(&paren.expr, named, found),
        Expr::Subquery(subquery) => collect(&subquery.expr, named, found),
        Expr::Binary(binary) => {
            let matching = binary.modifier.as_ref().and_then(|BinModifier { matching, .. }| matching.as_ref());
            let named = with(matching);
            collect(&binary.lhs, &named, found);
            collect(&binary.rhs, &named, found);
        }
        Expr::Call(call) => call.args.args.iter().for_each(|argument| collect(argument, named, found)),
        Expr::NumberLiteral(_) | Expr::StringLiteral(_) | Expr::Extension(_) => {}
    }
}

fn selected(selector: &VectorSelector, named: &BTreeSet<String>) -> Option<Selector> {
    let matchers = selector.matchers.matchers.clone();
    let labels = named.iter().chain(matchers.iter().map(|matcher| &matcher.name)).cloned().collect();
    Some(Selector { metric: selector.name.clone()?, matchers, labels })
}

fn result_labels(expression: &Expr) -> Option<BTreeSet<String>> {
    match expression {
        Expr::Aggregate(aggregate) => match &aggregate.modifier {
            Some(LabelModifier::Include(labels)) => Some(labels.labels.iter().cloned().collect()),
            Some(LabelModifier::Exclude(_)) => result_labels(&aggregate.expr),
            // `topk` keeps the labels, `sum` does not.
            None if aggregate.param.is_some() => result_labels(&aggregate.expr),
            None => Some(BTreeSet::new()),
        },
        Expr::Unary(unary) => result_labels(&unary.expr),
        Expr::Paren(paren) => result_labels(&paren.expr),
        Expr::Subquery(subquery) => result_labels(&subquery.expr),
        Expr::Binary(binary) if is_scalar(&binary.lhs) => result_labels(&binary.rhs),
        Expr::Binary(binary) => result_labels(&binary.lhs),
        Expr::Call(call) => {
            let vector = call.args.args.iter().find(|argument| !is_scalar(argument));
            let mut labels = vector.map_or_else(|| Some(BTreeSet::new()), |vector| result_labels(vector))?;
            if call.func.name == "histogram_quantile" {
                labels.remove("le");
            }
            Some(labels)
        }
        Expr::VectorSelector(_) | Expr::MatrixSelector(_) => None,
        Expr::NumberLiteral(_) | Expr::StringLiteral(_) | Expr::Extension(_) => Some(BTreeSet::new()),
    }
}

fn is_scalar(expression: &Expr) -> bool {
    matches!(expression.value_type(), ValueType::Scalar | ValueType::String)
}

#[test]
fn an_expression_names_metrics_their_labels_and_the_labels_of_its_result() -> Result<()> {
    let query = Query::parse(
        "sum by (route, le) (rate(a_bucket{x=~'1|2'}[5m])) / on (route) group_left max by (route) (b) > 0.2 * c{z!=''}",
    )?;
    let seen: Vec<_> = query.selectors().into_iter().map(|found| (found.metric, found.labels)).collect();
    let labels = |all: &[&str]| -> BTreeSet<String> { all.iter().map(ToString::to_string).collect() };
    let expected = [("a_bucket", labels(&["le", "route", "x"])), ("b", labels(&["route"])), ("c", labels(&["z"]))];
    assert_eq!(seen, expected.map(|(metric, labels)| (metric.to_owned(), labels)));
    for (expression, expected) in [
        ("histogram_quantile(0.9, sum by (le, route) (rate(a_bucket[5m])))", Some(labels(&["route"]))),
        ("topk(3, max by (x) (a))", Some(labels(&["x"]))),
        ("clamp_min(scalar(max(a)) - max by (x) (b), 0)", Some(labels(&["x"]))),
        ("sum(a{x=\"1\"}) or vector(0)", Some(labels(&[]))),
        ("a{x=\"1\"} - b", None),
    ] {
        assert_eq!(Query::parse(expression)?.result_labels(), expected, "{expression}");
    }
    assert!(Query::parse("sum(a").is_err());
    Ok(())
}
