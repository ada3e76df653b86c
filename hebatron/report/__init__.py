"""What a run folder shows: its history as pictures, as a page, and beside other runs."""
