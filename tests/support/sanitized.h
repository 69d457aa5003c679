/* Whether a sanitizer looks at this program, which makes it about ten times as slow: tests do fewer of what
 * they do many of. RACES: at threads only; what one thread does, or is the same in another place, is left to
 * the others. */
#ifndef TESTS_SUPPORT_SANITIZED_H
#define TESTS_SUPPORT_SANITIZED_H

#if defined __SANITIZE_THREAD__
enum { SANITIZED = 1, RACES = 1 };
#elif defined __SANITIZE_ADDRESS__
enum { SANITIZED = 1, RACES = 0 };
#else
enum { SANITIZED = 0, RACES = 0 };
#endif
#endif
