"""Rules that choose which key blocks a query tile attends, under one interface, so that they can be measured alike."""
