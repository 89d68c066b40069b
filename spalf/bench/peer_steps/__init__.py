"""One training step of other libraries' own trainers. Run by their interpreter, where spalf is not installed: only the
standard library, torch and the library that is measured are imported, and modules of this package relatively."""
