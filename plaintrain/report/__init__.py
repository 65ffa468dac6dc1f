"""Report on one or several runs as a single HTML file."""
