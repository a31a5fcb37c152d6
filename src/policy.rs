//! Who may share with whom: the operator's half of every right (the other half is the exporter's
//! GRANT). Pure.
//!
//! It knows endpoints, not buffers, and nothing of how much (`limits`).

use crate::ids::PeerId;

/// One side of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// This endpoint.
    One(PeerId),
    /// Every endpoint.
    Any,
}

impl Side {
    fn covers(self, peer: PeerId) -> bool {
        match self {
            Side::One(one) => one == peer,
            Side::Any => true,
        }
    }
}

/// `--allow FROM:TO[:ro]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Exporter.
    pub from: Side,
    /// Consumer.
    pub to: Side,
    /// The consumer never writes what the exporter sees.
    pub read_only: bool,
}

/// What the operator lets a consumer do with an exporter's buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowed {
    /// No sharing.
    No,
    /// Reading only, from a copy.
    ReadOnly,
    /// As the exporter grants.
    Yes,
}

/// The operator's rules. Where none applies, a VM may share with the host and with nobody else.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    rules: Vec<Rule>,
}

impl Policy {
    /// Policy of these rules; their order does not matter.
    pub fn new(rules: Vec<Rule>) -> Policy {
        Policy { rules }
    }

    /// What `to` may do with buffers of `from`. A `:ro` rule wins over any other.
    pub fn allows(&self, from: PeerId, to: PeerId) -> Allowed {
        if from == to {
            return Allowed::No;
        }
        let default = if to == PeerId::HOST { Allowed::Yes } else { Allowed::No };
        self.rules
            .iter()
            .filter(|rule| rule.from.covers(from) && rule.to.covers(to))
            .map(|rule| if rule.read_only { Allowed::ReadOnly } else { Allowed::Yes })
            .reduce(|a, b| if a == Allowed::ReadOnly { a } else { b })
            .unwrap_or(default)
    }

    /// Whether the two know of each other: sharing is allowed in at least one direction.
    pub fn acquainted(&self, one: PeerId, other: PeerId) -> bool {
        self.allows(one, other) != Allowed::No || self.allows(other, one) != Allowed::No
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: PeerId = PeerId(2);
    const B: PeerId = PeerId(3);

    fn rule(from: Side, to: Side, read_only: bool) -> Rule {
        Rule { from, to, read_only }
    }

    #[test]
    fn by_default_a_vm_shares_with_the_host_only() {
        let policy = Policy::default();
        assert_eq!(policy.allows(A, PeerId::HOST), Allowed::Yes);
        assert_eq!(policy.allows(PeerId::HOST, A), Allowed::No);
        assert_eq!(policy.allows(A, B), Allowed::No);
        assert!(!policy.acquainted(A, B));
        assert!(policy.acquainted(A, PeerId::HOST));
    }

    #[test]
    fn read_only_wins_in_any_order() {
        let narrow = rule(Side::One(A), Side::One(PeerId::HOST), true);
        let wide = rule(Side::Any, Side::Any, false);
        for rules in [vec![narrow, wide], vec![wide, narrow]] {
            let policy = Policy::new(rules);
            assert_eq!(policy.allows(A, PeerId::HOST), Allowed::ReadOnly);
            assert_eq!(policy.allows(A, B), Allowed::Yes);
            assert_eq!(policy.allows(A, A), Allowed::No);
        }
    }
}
