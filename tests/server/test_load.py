"""200 clients of all kinds for a while: nothing lost or garbled, nobody held up, nothing left behind."""
