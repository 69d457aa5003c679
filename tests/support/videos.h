/* Files as the frames of a video's data: URL. */
#ifndef TESTS_SUPPORT_VIDEOS_H
#define TESTS_SUPPORT_VIDEOS_H
char *video_url(const char *const *files, int n); /* malloc'd; aborts the test on failure */
#endif
