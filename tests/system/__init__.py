"""A package, so that its conftest.py is a different module from the one of all tests."""
