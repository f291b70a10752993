"""What the checkup shows: sentences, curves, maps, one page."""
