"""What every other package builds on: splitting work by memory, and later errors, devices and storage."""
