"""The data, the judges and the evaluation of the embedded model of emoji; see docs/emoji.md."""
