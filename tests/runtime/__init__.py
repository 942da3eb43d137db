"""The parts of csrc/base and csrc/runtime that need no program."""
