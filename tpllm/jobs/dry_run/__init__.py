"""What a job would do: checked, counted and timed, with nothing written."""
