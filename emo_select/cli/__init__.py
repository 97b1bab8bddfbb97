"""The command line: one thin module per group of commands. Nothing else imports it."""
