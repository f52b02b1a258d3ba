"""The commands of `dove-fast`: each module adds one to the parser and runs it."""
