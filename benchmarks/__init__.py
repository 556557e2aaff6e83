"""Commands that measure: learning, speed and editing quality."""
