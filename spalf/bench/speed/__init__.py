"""`spalf bench speed`: whole training steps, ours and other libraries', beside what the chip could do.

Everything that is measured goes into one JSON document; the page and the tables are made from it alone.
"""
