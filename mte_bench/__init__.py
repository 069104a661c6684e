"""The ground floor: command line, settings, records, data and encoders that the other three packages share."""

__version__ = "0.1.0"
