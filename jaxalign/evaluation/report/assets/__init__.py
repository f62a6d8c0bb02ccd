"""The page's markup, style and script, as they stand in the file that is written."""
