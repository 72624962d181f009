"""The fault laboratory: the service as real processes, hurt at every await of its hot path and from outside. `make faults`."""
