"""The adapter to Composer and Streaming: the only folder that imports either."""
