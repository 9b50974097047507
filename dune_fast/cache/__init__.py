"""Teachers' features on disk: computed once over fixed views of every image, read by runs in the teachers' place."""
