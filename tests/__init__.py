"""Tests, by what they need: `service` a computer, `fleet` test machines, `bench` patience."""
