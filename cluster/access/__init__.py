"""Who may do what: keys, tokens, roles, and the record of who did."""
