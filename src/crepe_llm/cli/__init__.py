"""The `crepe` command, one file a subcommand."""
