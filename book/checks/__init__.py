"""Checks the book: links and anchors of the built pages, commands and numbers of the sources."""
