"""Pure mathematics: arrays in, arrays out; no files, no clock."""
