"""Searching for the coefficients of the CRePE score."""
