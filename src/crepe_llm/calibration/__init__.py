"""Calibration data: windows, and what can be known to fail before any time is spent."""
