"""An index of one's own recordings, searched by sound."""
