"""Draws the figures of the book and of ARCHITECTURE.md as SVG, in the colours of the live page."""
