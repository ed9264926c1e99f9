"""Where a job's rows come from: files of one kind, local or remote, read lazily and twice (once to know them, once to run them)."""
