"""The version of fedlearn; all other files read it from here."""

VERSION = "0.2.0"
