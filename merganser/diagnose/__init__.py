"""Why a merged model is worse than its parts."""
