"""Shared code of the study commands: the audit of a method, the methods, and the pages."""
