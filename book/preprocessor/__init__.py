"""Turns the chapters' sources into what mdBook renders: directives, results, formulas and figures."""
