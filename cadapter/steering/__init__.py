"""Whether an adapter steers, at which strength, and at what cost: what ``eval`` tells beyond single losses."""
