"""Tests of edgerun/techniques."""
