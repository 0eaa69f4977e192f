"""An adapter and a policy for Forebay."""
