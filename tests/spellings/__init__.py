"""Every step of the prologue in every wording that is known, combined at random."""
