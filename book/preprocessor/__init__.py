"""Turns the sources of the book's chapters into what mdBook renders: directives, results, formulas, figures."""
