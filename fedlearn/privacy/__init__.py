"""Privacy: mechanisms, one ledger, secure aggregation, an audit."""
