"""The bracket `low_rank`: which leaves become Frames, and how they come back."""
