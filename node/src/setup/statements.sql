CREATE FUNCTION anabranch.statements(command text, most int DEFAULT NULL) RETURNS text[] LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp SET standard_conforming_strings = on
AS $f$
DECLARE
    -- The statements of a string, without strings, quoted names and comments, as what is in them is no statement. NULL where that cannot be
    -- told. With `most`, no more are looked for once there are more than that. Backslashes are as under standard_conforming_strings.
    statements text[] := '{}';
    -- A long text is taken in pieces: taking a token off costs by the length of what is left. `later` comes behind them.
    rest text := left(command, 4000);
    later text := substr(command, 4001);
    bare text := '';
    token text;
    -- What stands right before the token, with nothing between; and whether a string that goes on in the next line has escapes.
    before text := '';
    escaped boolean := false;
    depth int;
    body text;
    -- The beginning of the rest: a pattern that is tried costs by the length of the text.
    near text;
BEGIN
    IF command IS NULL THEN
        RETURN NULL;
    END IF;
    WHILE rest <> '' LOOP
        IF later <> '' AND length(rest) < 1000 THEN
            rest := rest || left(later, 4000);
            later := substr(later, 4001);
        END IF;
        near := left(rest, 500);
        token := substring(near from '^[^''"$/;-]+');
        IF token IS NOT NULL THEN
            bare := bare || token;
            before := before || right(token, 80);
            escaped := escaped AND token !~ '\S';
            rest := substr(rest, length(token) + 1);
            CONTINUE;
        END IF;
        IF left(near, 2) = '--' THEN
            token := substring(rest from '^[^\n\r]+');
        ELSIF left(near, 2) = '/*' THEN
            depth := 0;
            token := '';
            -- They nest.
            LOOP
                body := substring(substr(rest, length(token) + 1) from '^(?:[^*/]|\*(?!/)|/(?!\*))*(?:\*/|/\*)');
                token := token || body;
                EXIT WHEN body IS NULL;
                depth := depth + CASE WHEN right(body, 2) = '*/' THEN -1 ELSE 1 END;
                EXIT WHEN depth <= 0;
            END LOOP;
        ELSIF left(near, 1) = '''' THEN
            escaped := escaped OR before ~ '(^|[^A-Za-z0-9_$\x80-\U0010ffff])[eE]$';
            body := CASE WHEN escaped THEN '^''(?:[^''\\]|''''|\\.)*''' ELSE '^''(?:[^'']|'''')*''' END;
            token := substring(near from body);
            IF token IS NULL OR token = near THEN
                token := substring(rest from body);
            END IF;
        ELSIF left(near, 1) = '"' THEN
            token := substring(rest from '^"(?:[^"]|"")*"');
            escaped := false;
        ELSIF left(near, 1) = '$' AND before !~ '[A-Za-z0-9_$\x80-\U0010ffff]$'
            AND near ~ '^\$(?:[A-Za-z_\x80-\U0010ffff][A-Za-z0-9_\x80-\U0010ffff]*)?\$' THEN
            body := substring(near from '^\$[^$]*\$');
            depth := strpos(substr(rest, length(body) + 1), body);
            token := CASE WHEN depth > 0 THEN left(rest, 2 * length(body) + depth - 1) END;
            escaped := false;
        ELSE
            token := left(near, 1);
            escaped := false;
            -- In parentheses (the actions of a rule) and in the body of a function in SQL it ends nothing.
            depth := 1;
            IF token = ';' THEN
                depth := length(replace(bare, ')', '')) - length(replace(bare, '(', ''));
                body := substring(bare from '(?i)^\s*create\s+(?:or\s+replace\s+)?(?:function|procedure)\M.*?\mbegin\s+(atomic\M.*)$');
                depth := depth + coalesce(1 + regexp_count(body, '\m(begin|case)\M', 1, 'i') - regexp_count(body, '\mend\M', 1, 'i'), 0);
            END IF;
            IF depth = 0 THEN
                IF bare ~ '\S' THEN
                    statements := statements || btrim(bare, E' \t\r\n\f');
                END IF;
                IF cardinality(statements) > most THEN
                    RETURN statements;
                END IF;
                bare := '';
                before := '';
            ELSE
                bare := bare || token;
                before := before || token;
            END IF;
            rest := substr(rest, 2);
            CONTINUE;
        END IF;
        -- It may end in what comes later.
        IF later <> '' AND (token IS NULL OR token = rest) THEN
            near := left(later, length(rest));
            rest := rest || near;
            later := substr(later, length(near) + 1);
            CONTINUE;
        END IF;
        IF token IS NULL THEN
            RETURN NULL;
        END IF;
        rest := substr(rest, length(token) + 1);
        bare := bare || ' ';
        before := '';
    END LOOP;
    depth := length(replace(bare, ')', '')) - length(replace(bare, '(', ''));
    body := substring(bare from '(?i)^\s*create\s+(?:or\s+replace\s+)?(?:function|procedure)\M.*?\mbegin\s+(atomic\M.*)$');
    IF depth <> 0 OR 1 + regexp_count(body, '\m(begin|case)\M', 1, 'i') <> regexp_count(body, '\mend\M', 1, 'i') THEN
        RETURN NULL;
    END IF;
    IF bare ~ '\S' THEN
        statements := statements || btrim(bare, E' \t\r\n\f');
    END IF;
    RETURN statements;
END $f$;
