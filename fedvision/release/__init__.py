"""The finished model as it is given away: with a card, signed, and on request as a MONAI bundle."""
