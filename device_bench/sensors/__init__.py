"""Parsers of what Android and Jetson print about themselves: text -> a value, or `Absent` with the reason.

Pure functions. None raises on any text, and none takes a number from a line that it does not know.
"""
