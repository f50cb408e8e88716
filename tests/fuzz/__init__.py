"""Tests that go on for as long as they are told to; CI runs a short part of each."""
