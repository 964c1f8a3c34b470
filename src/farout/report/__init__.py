"""HTML pages, charts and thumbnails."""
