"""What a job writes: its folder, the journal and parts in it, and how they survive whatever ends the process."""
